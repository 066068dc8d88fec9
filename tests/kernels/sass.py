"""Machine code as ``cuobjdump`` prints it: where a kernel touches local memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
BACK = re.compile(r"BRA.*?0x([0-9a-f]+)")


def loops_over_keys(cubin: Path) -> list[list[str]]:
    """Instructions of every innermost loop that holds warpgroup products and writes no output."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = [(int(m.group(1), 16), m.group(2)) for m in map(LINE.match, text.splitlines()) if m]
    place = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (address, instruction) in enumerate(code):
        to = BACK.search(instruction)
        if to and int(to.group(1), 16) < address and int(to.group(1), 16) in place:
            spans.append((place[int(to.group(1), 16)], i))
    inner = [
        s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] and _products(code, o) for o in spans)
    ]
    loops = [[text for _, text in code[a : b + 1]] for a, b in inner if _products(code, (a, b))]
    return [loop for loop in loops if not any("STG" in text for text in loop)]


def _products(code: list[tuple[int, str]], span: tuple[int, int]) -> int:
    return sum("HGMMA" in text for _, text in code[span[0] : span[1] + 1])


def local_memory(loop: list[str]) -> list[str]:
    """Loads and stores of spilled registers."""
    return [text for text in loop if "LDL" in text or "STL" in text]
