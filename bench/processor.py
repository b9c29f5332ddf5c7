"""What the machine computes with."""

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"
