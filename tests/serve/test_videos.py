"""Videos in requests: limits, separate threads, and cancellation."""

import base64
import io
import json
import socket
import struct
import time

import pytest
from PIL import Image as PilImage

from tests.serve.fixtures import ask, body, on_a_port
from vila.media import limits as media_limits
from vila.serve.app import create_app
from vila.serve.messages import SERVER_MEDIA


def user(*parts: dict) -> list:
    return [{"role": "user", "content": list(parts)}]


def gif(frames: int, side: int) -> bytes:
    """A GIF whose frames change one pixel of a large canvas: small in bytes, slow to decode."""
    canvas = PilImage.new("L", (side, side))
    images = []
    for number in range(frames):
        image = canvas.copy()
        image.putpixel((number % side, 0), 255)
        images.append(image)
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=40)
    return stream.getvalue()


def part(content: bytes, **more: int) -> dict:
    url = f"data:image/gif;base64,{base64.b64encode(content).decode()}"
    return {"type": "video_url", "video_url": {"url": url, **more}}


@pytest.mark.parametrize("side", [4097, 32_767])
def test_videos_with_large_frames_are_rejected_with_their_location(app, side):
    small = gif(2, 1)
    content = small[:6] + struct.pack("<2H", side, side) + small[10:]
    answer = ask(app, messages=user(part(content)))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_media", "messages[0].content[0]")


def test_limits_of_a_server_are_within_those_of_files():
    for name in SERVER_MEDIA.__slots__:
        assert getattr(SERVER_MEDIA, name) <= getattr(media_limits.DEFAULT_LIMITS, name), name


def test_frames_are_resized_while_decoding_without_changing_the_answer(service, app, monkeypatch):
    kept = []
    keep = media_limits.DecodeMeter.keep_frame
    monkeypatch.setattr(
        media_limits.DecodeMeter, "keep_frame", lambda self, *size: kept.append(size) or keep(self, *size)
    )
    content = gif(9, 300)
    answer = ask(app, messages=user(part(content, num_frames=4)))
    assert answer.status_code == 200
    assert kept == [(28, 28)] * 4
    with PilImage.open(io.BytesIO(content)) as image:
        frames = []
        for index in (0, 2, 4, 7):
            image.seek(index)
            stream = io.BytesIO()
            image.convert("RGB").save(stream, "PNG")
            frames.append(base64.b64encode(stream.getvalue()).decode())
    images = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{frame}"}} for frame in frames]
    gap = service.models.models[0].batcher.engine.processor.find_template().media_gap
    between = [{"type": "text", "text": gap}] if gap else []
    expected = ask(app, messages=user(*[each for image in images for each in (image, *between)]))
    assert answer.json()["choices"][0]["message"] == expected.json()["choices"][0]["message"]
    assert answer.json()["usage"]["prompt_tokens"] == expected.json()["usage"]["prompt_tokens"]


def test_decoding_stops_for_disconnected_clients(service, monkeypatch):
    decoded = []
    count = media_limits.DecodeMeter.count_frame

    def slow(self, width, height):
        decoded.append(time.monotonic())
        time.sleep(0.02)
        count(self, width, height)

    monkeypatch.setattr(media_limits.DecodeMeter, "count_frame", slow)
    asked = json.dumps(body(messages=user(part(gif(1000, 16))))).encode()  # 20 s each
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(asked)}", "", ""])
    with on_a_port(create_app(service)) as port:
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for connection in connections:
            connection.sendall(head.encode() + asked)
        wait_until(lambda: len(decoded) > 4)
        begun = time.monotonic()
        assert ask(create_app(service)).status_code == 200  # text alone, while videos are decoded
        assert time.monotonic() - begun < 5
        for connection in connections:
            connection.close()
        wait_until(lambda: service.threads.decoding._work_queue.empty() and time.monotonic() - decoded[-1] > 0.3)
    assert len(decoded) < 1000


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
