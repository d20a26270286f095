"""From where on an audit flags a token: calibrated per model directory and dtype, or the defaults.

`tally profile calibrate` writes CALIBRATION_FILE beside the weights; profile.py puts what it says into the profile, so
whoever serves or audits the model reads the same file or has another profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from incentives.evidence import MAX_FLAG_PPM
from node.engine.spec import ModelError, read_json

CALIBRATION_FILE: Final = "calibration.json"
CALIBRATION_FORMAT: Final = "tally/calibration/1"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Logits x 1000, nats x 1e6, relative distance x 1e6; and the rate granted to honest work, per million tokens."""

    margin_milli: int
    logprob_micro: int
    projection_micro: int
    flag_ppm: int


ANY_FLAG_PPM: Final = 1_000_000
"""A profile that grants honest work any number of flags: nobody is judged under it, the Court does not take it."""

UNCALIBRATED: Final = {
    "fp32": Thresholds(margin_milli=100, logprob_micro=20_000, projection_micro=30_000, flag_ppm=1_000),
    "bf16": Thresholds(margin_milli=100, logprob_micro=20_000, projection_micro=30_000, flag_ppm=ANY_FLAG_PPM),
}
"""Where no calibration was made. In fp32 thousands of times the noise that was seen (none of 39,839 honest tokens of
the demo model passed them), though too wide for int8 weights. In bf16 noise is the model's own: between two kernels a
fifth of the demo model's honest tokens passed them, so without a calibration nobody is judged by them."""


def thresholds_of(model_dir: Path, dtype: str, weights: str, versions: dict[str, str]) -> Thresholds:
    """As calibrated in that directory, else of UNCALIBRATED. `weights`: the weights root, 0x and hexadecimal.

    `versions`: what decides the numbers beside the weights, as the calibration names it.
    Raises: ModelError when the calibration is of other weights or versions, or damaged.
    """
    path = model_dir / CALIBRATION_FILE
    if not path.exists():
        return UNCALIBRATED[dtype]
    again = f"`tally profile calibrate --model {model_dir} --force` makes it again, or delete it"
    read = read_json(path, again)
    entry = read.get("dtypes", {}).get(dtype) if isinstance(read.get("dtypes", {}), dict) else None
    if read.get("format") != CALIBRATION_FORMAT:
        raise ModelError(f"{path} is no calibration this version reads: {again}")
    if read.get("weights_root") != weights:
        raise ModelError(f"{path} is of other weights than lie beside it: {again}")
    if entry is None:
        return UNCALIBRATED[dtype]
    try:
        if entry["versions"] != versions:
            raise ModelError(f"{path} is of {_told(entry['versions'])}, this is {_told(versions)}: {again}")
        return _checked(entry["thresholds"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"{path} is damaged ({exc!r}): {again}") from exc


def _checked(numbers: Any) -> Thresholds:
    """Raises: KeyError, TypeError, ValueError."""
    found = Thresholds(*(numbers[name] for name in Thresholds.__slots__))
    for name in Thresholds.__slots__:
        value = getattr(found, name)
        if type(value) is not int or not 0 < value < 1 << 32:
            raise ValueError(f"{name} is {value!r}")
    if found.flag_ppm > MAX_FLAG_PPM:
        raise ValueError(f"flag_ppm is {found.flag_ppm}, the Court accepts up to {MAX_FLAG_PPM}")
    return found


def _told(versions: Any) -> str:
    return ", ".join(map(str, versions.values())) if isinstance(versions, dict) else str(versions)
