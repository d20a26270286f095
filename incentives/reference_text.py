"""The reference text that offers are compared over: five short originals, fixed for ever under their basket's name.

Written for this purpose and given to the public domain (CC0 1.0). Five kinds, because tokenizers differ most between
them: English prose, source code, JSON, German, Chinese. A changed letter would make old and new prices incomparable,
so a test holds the digest; another text is another basket with another name.
"""

from __future__ import annotations

import hashlib
from typing import Final

ENGLISH: Final = """\
The miller kept his accounts on hazel sticks. For every sack of flour he lent, he cut one notch across the wood, split
the stick down the middle, and gave the borrower the half without the handle. Neither of them could write, and neither
needed to: when the debt fell due, the two halves were laid side by side, and the notches had to run straight through
from one to the other. A notch too many showed at once, because the grain did not match. Nobody remembered a quarrel
that lasted longer than the time it took to find both halves. When the old man died, his daughter burned the settled
sticks in the bakehouse oven, and the village ate the bread that was baked over three hundred paid debts.
"""

PYTHON: Final = '''\
def settle(ledger: dict[str, int], payments: list[tuple[str, int]]) -> dict[str, int]:
    """Apply payments in order; a payment above the debt is refused and nothing of it is kept."""
    remaining = dict(ledger)
    for name, amount in payments:
        debt = remaining.get(name, 0)
        if amount <= 0 or amount > debt:
            raise ValueError(f"{name} owes {debt}, cannot pay {amount}")
        remaining[name] = debt - amount
        if remaining[name] == 0:
            del remaining[name]
    return remaining


if __name__ == "__main__":
    open_debts = {"anna": 12, "bertram": 7, "clara": 30}
    print(settle(open_debts, [("anna", 5), ("bertram", 7), ("clara", 29)]))
'''

JSON: Final = """\
{"order": 48213, "placed": "2026-03-14T09:26:53Z", "customer": {"id": "c-0917", "name": "Mill & Daughter", "vat": null},
 "lines": [{"sku": "FLR-550-25", "title": "Wheat flour, 25 kg", "quantity": 12, "unit_price": "18.40", "tax": 0.07},
  {"sku": "YST-DRY-01", "title": "Dry yeast, 500 g", "quantity": 3, "unit_price": "6.95", "tax": 0.07},
  {"sku": "STK-HZL-10", "title": "Hazel sticks, bundle of ten", "quantity": 1, "unit_price": "4.00", "tax": 0.19}],
 "delivery": {"street": "Am Wehr 3", "city": "Altenau", "zip": "38707", "window": [8, 12], "gate_code": "0x7f3a"},
 "totals": {"net": "245.65", "tax": "17.68", "gross": "263.33", "currency": "EUR"}, "paid": false, "notes": []}
"""

GERMAN: Final = """\
Der Müller führte seine Bücher auf Haselstöcken. Für jeden Sack Mehl, den er verlieh, schnitt er eine Kerbe quer
über das Holz, spaltete den Stock der Länge nach und gab dem Schuldner die Hälfte ohne Griff. Keiner von beiden
konnte schreiben, und keiner musste es: War die Schuld fällig, so legte man die Hälften nebeneinander, und jede
Kerbe musste gerade von der einen in die andere laufen. Eine überzählige verriet sich sofort, denn die Maserung
passte nicht. An einen Streit, der länger gedauert hätte als die Suche nach den beiden Hälften, konnte sich im
Dorf niemand erinnern.
"""

CHINESE: Final = """\
磨坊主人把账记在榛木棍上。每借出一袋面粉，他就在木棍上横着刻一道痕，再把木棍从中间劈成两半，
没有柄的那一半交给借的人。两个人都不识字，也用不着识字：到了还债的日子，把两半并排放在一起，
每一道刻痕都必须从这一半笔直地通到那一半。多刻的一道立刻就会露出来，因为木纹对不上。
村里没有人记得有哪一次争吵，比找齐这两半木棍所花的时间还要长。
老人去世以后，女儿把还清了的木棍都放进面包炉里烧了。
"""

TEXTS: Final = (
    ("english", ENGLISH),
    ("code", PYTHON),
    ("json", JSON),
    ("german", GERMAN),
    ("chinese", CHINESE),
)
"""Kind and text, in the order the digest takes them in."""

TEXT_BYTES: Final = sum(len(text.encode()) for _, text in TEXTS)
"""UTF-8 bytes of all texts together."""

DIGEST: Final = hashlib.sha256("\0".join(text for _, text in TEXTS).encode()).hexdigest()
"""SHA-256 of the texts, zero bytes between: what `basket` in a price comparison stands for."""
