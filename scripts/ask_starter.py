"""Ask the starter model, through `vila run`, about one picture, two, a clip, and with three examples; exit 1 if wrong.

    python scripts/ask_starter.py runs/starter/model

The pictures are of easy-VQA's test split, which the model has not seen. It was trained on pages of several pictures and
on questions about one, so of two pictures, or of a clip, it speaks about the last.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import av
from PIL import Image

from vila.core.files import cache_dir
from vila.starter.easy_vqa import obtain_easy_vqa

QUESTION = "what color is the shape?"
BROWN_CIRCLE, BLUE_RECTANGLE = 132, 427
EXAMPLES = {542: "black", 278: "black", 437: "green"}
ASKED = 630  # a green rectangle


def write_clip(path: Path, first: Path, second: Path, seconds: int = 10, rate: int = 8) -> Path:
    """A clip that shows one picture and from its middle on another."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate, options={"crf": "10"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        for number in range(seconds * rate):
            shown = first if 2 * number < seconds * rate else second
            container.mux(stream.encode(av.VideoFrame.from_image(Image.open(shown).convert("RGB"))))
        container.mux(stream.encode())
    return path


def main() -> int:
    """Ask, print question, expectation and answer, and count the wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = parser.parse_args().model
    images = obtain_easy_vqa(cache_dir()) / "test" / "images"

    def picture(number: int) -> str:
        return str(images / f"{number}.png")

    with tempfile.TemporaryDirectory() as folder:
        ahead = write_clip(Path(folder) / "a.mp4", images / f"{BROWN_CIRCLE}.png", images / f"{BLUE_RECTANGLE}.png")
        back = write_clip(Path(folder) / "b.mp4", images / f"{BLUE_RECTANGLE}.png", images / f"{BROWN_CIRCLE}.png")
        brown, blue = ["--image", picture(BROWN_CIRCLE)], ["--image", picture(BLUE_RECTANGLE)]
        shots = [word for n, text in EXAMPLES.items() for word in ("--shot", f"image={picture(n)}", f"text={text}")]
        cases = [
            ("one picture, its shape", [*brown, "--prompt", "what shape is in the image?"], "circle"),
            ("one picture, its color", [*brown, "--prompt", QUESTION], "brown"),
            ("two pictures", [*brown, *blue, "--prompt", QUESTION], "blue"),
            ("the two exchanged", [*blue, *brown, "--prompt", QUESTION], "brown"),
            ("ten seconds, brown then blue", ["--video", str(ahead), "--prompt", QUESTION], "blue"),
            ("ten seconds, blue then brown", ["--video", str(back), "--prompt", QUESTION], "brown"),
            ("three examples", [*shots, "--image", picture(ASKED), "--prompt", QUESTION], "green"),
        ]
        wrong = 0
        for name, words, expected in cases:
            command = [str(Path(sys.executable).with_name("vila")), "run", model, *words, "--max-new-tokens", "8"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            answer = done.stdout.strip() or done.stderr.strip()
            wrong += answer != expected
            print(f"{'right' if answer == expected else 'WRONG'}  {name}: {answer!r}, expected {expected!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
