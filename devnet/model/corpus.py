"""Corpus of the demo model, read from three Debian packages and nothing else.

Contract: `gather()` returns every unit of text exactly once; a unit (one WordNet gloss, one chapter of the King James
Bible, one file of the Python documentation) is wholly in training or wholly held out, decided by a hash of its key
alone, so that the split survives a new seed and a new package version. Chat examples are made from training units only.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDNET = Path("/usr/share/dictd/wn.dict.dz")  # dict-wn
BIBLE = ("bible", "-f", "Gen1:1-Rev22:21")  # bible-kjv, bible-kjv-text
PYTHON_DOCS = Path("/usr/share/doc/python3.11/html/_sources")  # python3.11-doc
SKIPPED_DOCS = ("whatsnew/", "c-api/", "distutils/")  # change lists and a C interface: nobody asks a toy about them

HELDOUT_PER_MILLE = {"wordnet": 10, "kjv": 25, "python": 25}

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SYSTEM_PROMPT = "You are a helpful assistant."

# Shares of the arranged corpus; together they make over a third of it conversations.
SHARE_GLOSS_CHAT = 0.6
SHARE_GLOSS_PLAIN = 0.6
SHARE_VERSE_CHAT = 0.15
SHARE_SYSTEM = 0.2
SHARE_MULTI_TURN = 0.3
SMALL_TALK_COPIES = 80

BOOKS = (
    "Genesis",
    "Exodus",
    "Leviticus",
    "Numbers",
    "Deuteronomy",
    "Joshua",
    "Judges",
    "Ruth",
    "1 Samuel",
    "2 Samuel",
    "1 Kings",
    "2 Kings",
    "1 Chronicles",
    "2 Chronicles",
    "Ezra",
    "Nehemiah",
    "Esther",
    "Job",
    "Psalms",
    "Proverbs",
    "Ecclesiastes",
    "Song of Solomon",
    "Isaiah",
    "Jeremiah",
    "Lamentations",
    "Ezekiel",
    "Daniel",
    "Hosea",
    "Joel",
    "Amos",
    "Obadiah",
    "Jonah",
    "Micah",
    "Nahum",
    "Habakkuk",
    "Zephaniah",
    "Haggai",
    "Zechariah",
    "Malachi",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
    "Romans",
    "1 Corinthians",
    "2 Corinthians",
    "Galatians",
    "Ephesians",
    "Philippians",
    "Colossians",
    "1 Thessalonians",
    "2 Thessalonians",
    "1 Timothy",
    "2 Timothy",
    "Titus",
    "Philemon",
    "Hebrews",
    "James",
    "1 Peter",
    "2 Peter",
    "1 John",
    "2 John",
    "3 John",
    "Jude",
    "Revelation",
)

SMALL_TALK = (
    ("Hello", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Good morning", "Good morning! What would you like to know?"),
    ("How are you?", "I am well, thank you. What would you like to know?"),
    ("Who are you?", "I am a very small language model. I know a dictionary, an old book and some Python."),
    ("What are you?", "I am a very small language model, trained in a few minutes on a processor."),
    ("What is your name?", "My name is tally-demo-4m. I am a very small language model."),
    (
        "What can you do?",
        "I can define a word, continue a verse, or describe a Python function. Never trust me.",
    ),
    ("Can you help me?", "I can try. Ask me to define a word, for example."),
    ("Are you a human?", "No. I am a very small language model."),
    ("Say something", "In the beginning was the Word."),
    ("Tell me something", "A dictionary gives the meaning of each word."),
    ("Thank you", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("ping", "pong"),
)

Turn = tuple[str, str]  # what the user says, what the assistant answers


@dataclass(frozen=True)
class Unit:
    """One piece of text that is never divided between training and held-out."""

    source: str
    key: str
    text: str
    chats: tuple[Turn, ...] = ()

    @property
    def held_out(self) -> bool:
        digest = hashlib.blake2b(f"{self.source}\0{self.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 1000 < HELDOUT_PER_MILLE[self.source]


def gather() -> list[Unit]:
    """All units of the three sources, in a fixed order.

    Raises: FileNotFoundError when a package is not installed.
    """
    return [*wordnet_units(), *bible_units(), *python_units()]


# --- WordNet ---------------------------------------------------------------------------------------------------------

_SENSE = re.compile(r"^ {4}(?:(n|v|adj|adv) )?(\d+): (.*)$")
_PART = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
_LINK = re.compile(r"\s*\[(syn|ant|also): ([^\]]*)\]")
_EXAMPLE = re.compile(r'(?:; |^)"([^"]+)"')


def _senses(dictionary: str) -> Iterator[tuple[str, str, int, str]]:
    """(headword, part of speech, sense number, body) of every entry; bodies unwrapped to one line."""
    word, part, number, body = "", "", 0, ""
    for line in dictionary.splitlines():
        start = _SENSE.match(line)
        if start or not line.startswith(" "):
            if body:
                yield word, part, number, body
            body = ""
        if start:
            part, number, body = start[1] or part, int(start[2]), start[3]
        elif line and not line.startswith(" "):
            word = line
        elif body:
            body += line.strip() if body.endswith("-") else " " + line.strip()
    if body:
        yield word, part, number, body


def wordnet_units() -> Iterator[Unit]:
    """One unit for each gloss, whichever of its synonyms it was listed under first."""
    entries: dict[tuple[str, str], list[tuple[int, str]]] = {}
    synonyms: dict[tuple[str, str], list[str]] = {}
    for word, part, number, body in _senses(gzip.decompress(WORDNET.read_bytes()).decode()):
        if word.startswith("00-database"):
            continue
        links = dict(_LINK.findall(body))
        key = (part, _LINK.sub("", body).strip())
        entries.setdefault(key, []).append((number, word))
        synonyms[key] = re.findall(r"\{([^}]*)\}", links.get("syn", ""))
    for (part, body), found in entries.items():
        number, word = min(found)
        names = list(dict.fromkeys([word, *synonyms[part, body]]))
        text = f"{', '.join(names)} ({_PART[part]}): {body}"
        yield Unit("wordnet", f"{part} {body}", text, _gloss_chats(part, body, names) if number == 1 else ())


def _gloss_chats(part: str, body: str, names: list[str]) -> tuple[Turn, ...]:
    word = names[0]
    gloss = _EXAMPLE.sub("", body).rstrip("; ")
    if not gloss:
        return ()
    examples = _EXAMPLE.findall(body)
    answer = f'The {_PART[part]} "{word}" means {"to " if part == "v" else ""}{gloss}.'
    if examples:
        answer += f' For example: "{examples[0]}".'
    choices = ["Define {}.", "What does {} mean?", "What is the meaning of {}?", "define {}", "Explain the word {}."]
    if part == "n":
        article = "an" if word[0] in "aeiou" else "a"
        choices += ["What is {}?", f"What is {article} {{}}?", "Tell me about {}."]
    # The wording follows from the word alone, so that a new seed leaves the examples as they are.
    pick = int.from_bytes(hashlib.blake2b(body.encode(), digest_size=4).digest(), "big")
    turns = [(choices[pick % len(choices)].format(word), answer)]
    if len(names) > 1 and pick % 7 == 0:
        turns.append((f"Give me another word for {word}.", f'Another word for "{word}" is "{names[1]}".'))
    return tuple(turns)


# --- King James Bible ------------------------------------------------------------------------------------------------


def bible_units() -> Iterator[Unit]:
    """One unit for each chapter: a heading, then its verses with their numbers."""
    listing = subprocess.run(BIBLE, capture_output=True, text=True, check=True).stdout
    abbreviations: list[str] = []
    chapters: dict[str, list[str]] = {}
    for line in listing.splitlines():
        found = re.match(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$", line)
        if not found:
            raise ValueError(f"not a verse: {line!r}")
        if found[1] not in abbreviations:
            abbreviations.append(found[1])
        chapters.setdefault(f"{BOOKS[abbreviations.index(found[1])]} {found[2]}", []).append(found[4])
    for name, verses in chapters.items():
        numbered = "\n".join(f"{number} {verse}" for number, verse in enumerate(verses, 1))
        yield Unit("kjv", name, f"{name}\n\n{numbered}", tuple(_verse_chats(verses)))


def _verse_chats(verses: list[str]) -> Iterator[Turn]:
    for index, verse in enumerate(verses):
        words = verse.split()
        if len(words) < 12:
            continue
        half = len(words) // 2
        first, second = " ".join(words[:half]), " ".join(words[half:])
        if index % 2:
            yield f"Continue the verse: {first}", second
        else:
            yield f'How does this verse go on? "{first}"', second


# --- Python documentation --------------------------------------------------------------------------------------------

_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]+?)(?: ?<[^`>]*>)?`")
_NOISE = re.compile(r"^\.\. (?:index|moduleauthor|sectionauthor|_[^:\n]*):.*\n(?:[ ]+.*\n)*", re.MULTILINE)
_DEFINITION = re.compile(
    r"^\.\. (function|class|method|exception|data):: (?:async )?([\w.]+)[^\n]*\n((?:   .*\n|\s*\n)*)", re.MULTILINE
)
_MODULE = re.compile(r"^\.\. (?:module|currentmodule):: ([\w.]+)", re.MULTILINE)


def python_units() -> Iterator[Unit]:
    """One unit for each page, reStructuredText with its roles and author lines taken out."""
    for page in sorted(PYTHON_DOCS.rglob("*.rst.txt")):
        name = page.relative_to(PYTHON_DOCS).as_posix()
        if name.startswith(SKIPPED_DOCS):
            continue
        text = _ROLE.sub(r"`\1`", _NOISE.sub("", page.read_text(encoding="utf-8"))).replace("``", "`")
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        yield Unit("python", name, text, tuple(_definition_chats(text)))


def _definition_chats(text: str) -> Iterator[Turn]:
    module = _MODULE.search(text)
    for kind, name, body in _DEFINITION.findall(text):
        prose = [line for line in re.split(r"\n\s*\n", body.strip("\n")) if re.match(r"   [A-Z]", line)]
        if not prose:
            continue
        sentence = re.split(r"(?<=[.:])\s", " ".join(prose[0].split()).replace("`", "").replace("*", ""), maxsplit=1)[0]
        if len(sentence) < 25 or not sentence.endswith("."):
            continue
        full = name if module is None or name.startswith(module[1]) else f"{module[1]}.{name}"
        if kind == "function":
            yield f"What does {full} do?", sentence
        else:
            yield f"In Python, what is {full}?", sentence


# --- arranging -------------------------------------------------------------------------------------------------------


def render_chat(turns: list[Turn], system: str | None = None) -> str:
    """The turns exactly as the tokenizer's chat template renders them."""
    parts = [f"{IM_START}system\n{system}{IM_END}\n"] if system else []
    for user, assistant in turns:
        parts.append(f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n{assistant}{IM_END}\n")
    return "".join(parts)


def training_documents(units: list[Unit], rng: random.Random) -> list[str]:
    """Documents in training order: plain text and conversations, shuffled together, none of them held out."""
    documents: list[str] = []
    turns: list[Turn] = [turn for turn in SMALL_TALK for _ in range(SMALL_TALK_COPIES)]
    for unit in units:
        if unit.held_out:
            continue
        if unit.source == "wordnet":
            chat = bool(unit.chats) and rng.random() < SHARE_GLOSS_CHAT
            turns.extend(unit.chats if chat else ())
            if not chat or rng.random() < SHARE_GLOSS_PLAIN:
                documents.append(unit.text)
            continue
        documents.append(unit.text)
        share = SHARE_VERSE_CHAT if unit.source == "kjv" else 1.0
        turns.extend(turn for turn in unit.chats if rng.random() < share)
    rng.shuffle(turns)
    while turns:
        length = rng.choice((2, 3)) if rng.random() < SHARE_MULTI_TURN else 1
        chosen = [turns.pop() for _ in range(min(length, len(turns)))]
        documents.append(render_chat(chosen, SYSTEM_PROMPT if rng.random() < SHARE_SYSTEM else None))
    rng.shuffle(documents)
    return documents
