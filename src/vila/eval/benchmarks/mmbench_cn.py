"""MMBench-CN: MMBench's questions in Chinese, asked for the letter in Chinese.

The original's documents put `mmbench_dev_cn_20231003.tsv` into `mmbench/`, its scripts look for it in `mmbench_cn/`.
"""

from __future__ import annotations

from pathlib import Path

from vila.eval.benchmarks.mmbench import MmBench
from vila.eval.folders import look


class MmBenchCn(MmBench):
    """The Chinese development split."""

    name = "mmbench_cn"
    file = "mmbench_dev_cn_20231003.tsv"
    suffix = "请直接回答选项字母。"

    def _find(self, folder: Path) -> Path:
        return look(folder, "mmbench", self.file) or super()._find(folder)
