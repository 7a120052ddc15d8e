"""Coverage-guided fuzzing of framing, messages and the service behind them. Needs ``pip install atheris`` (Linux).

::

    python tests/fuzz/fuzz_socket.py -max_total_time=600 build/fuzz tests/fuzz/corpus

New finds go to ``build/fuzz`` (make it first); the small corpus is kept in the repository. ``--seed FOLDER`` writes one
input per message and op.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def write_seeds(folder: Path) -> None:
    """One valid input per message, and per op as a client asks it."""
    from tests.fuzz.seeds import seeds

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)


def main() -> None:
    """Fuzz until libFuzzer's own options say stop."""
    import atheris

    with atheris.instrument_imports(include=["luna_daemon"]):
        from tests.fuzz.target import Target

    logging.disable(logging.CRITICAL)
    target = Target()
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seed"]:
        write_seeds(Path(sys.argv[2]))
    else:
        main()
