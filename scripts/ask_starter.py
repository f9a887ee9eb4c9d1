"""Ask the starter model about one image, two images, a video, and with three examples; exit 1 for a wrong answer.

    python scripts/ask_starter.py runs/starter/model

Questions are asked with `vila run`. The images are of the test split of easy-VQA, which is not trained on. The model
was trained on pages with several images and on questions about one image, so for two images or a video it answers
about the last one.
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


def write_video(path: Path, first: Path, second: Path, seconds: int = 10, rate: int = 8) -> Path:
    """Write a video that shows one image in its first half and another in its second."""
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
    """Ask all questions, print answers and expected answers, and return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = parser.parse_args().model
    images = obtain_easy_vqa(cache_dir()) / "test" / "images"

    def image(number: int) -> str:
        return str(images / f"{number}.png")

    with tempfile.TemporaryDirectory() as folder:
        ahead = write_video(Path(folder) / "a.mp4", images / f"{BROWN_CIRCLE}.png", images / f"{BLUE_RECTANGLE}.png")
        back = write_video(Path(folder) / "b.mp4", images / f"{BLUE_RECTANGLE}.png", images / f"{BROWN_CIRCLE}.png")
        brown, blue = ["--image", image(BROWN_CIRCLE)], ["--image", image(BLUE_RECTANGLE)]
        shots = [word for n, text in EXAMPLES.items() for word in ("--shot", f"image={image(n)}", f"text={text}")]
        cases = [
            ("one image, shape", [*brown, "--prompt", "what shape is in the image?"], "circle"),
            ("one image, color", [*brown, "--prompt", QUESTION], "brown"),
            ("two images", [*brown, *blue, "--prompt", QUESTION], "blue"),
            ("two images exchanged", [*blue, *brown, "--prompt", QUESTION], "brown"),
            ("ten seconds, brown then blue", ["--video", str(ahead), "--prompt", QUESTION], "blue"),
            ("ten seconds, blue then brown", ["--video", str(back), "--prompt", QUESTION], "brown"),
            ("three examples", [*shots, "--image", image(ASKED), "--prompt", QUESTION], "green"),
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
