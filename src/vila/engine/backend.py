"""Which backend computes an engine's LLM: torch or onnxruntime, chosen once and said aloud."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vila.core.errors import ConfigError
from vila.core.progress import SILENT, Events
from vila.engine.fast_decoder import FastDecoder, unsupported_reason
from vila.engine.onnx.weights import ACTIVATION_BITS, FIXED_ROPE
from vila.kernels.select import use_backend
from vila.model.int4_weights import int4_weights
from vila.model.modeling import VilaForConditionalGeneration

if TYPE_CHECKING:
    from vila.engine.fast_decoder import FastDecoder, unsupported_reason
    from vila.engine.onnx.graph import ActivationBits
    from vila.engine.onnx.program import OnnxProgram
from vila.engine.onnx.weights import HeadBits

Backend = Literal["auto", "torch", "onnx"]
BACKENDS = ("auto", "torch", "onnx")


def check_backend(backend: str, head_bits: int, threads: int, device: str, activation_bits: int = 0) -> None:
    """Refuse what cannot be, before any weight is read. Bits of 0 leave the choice to the backend.

    Raises ConfigError for an unknown backend, for onnxruntime that is missing or asked to run elsewhere than on a CPU,
    and for its options without it.
    """
    if backend not in BACKENDS:
        raise ConfigError(field="backend", value=backend, expected="auto, torch or onnx")
    if head_bits not in (0, 4, 8, 32):
        raise ConfigError(field="head_bits", value=head_bits, expected="4, 8 or 32")
    if activation_bits not in (0, *ACTIVATION_BITS):
        raise ConfigError(field="activation_bits", value=activation_bits, expected="8, 16 or 32")
    if head_bits in (4, 8) and backend != "onnx":
        raise _onnx_only("head_bits", head_bits)
    if activation_bits and backend == "torch":
        raise _onnx_only("activation_bits", activation_bits)
    if threads and backend == "torch":
        raise _onnx_only("threads", threads, "leave it out; torch.set_num_threads sets PyTorch's")
    if backend == "onnx" and device != "cpu":
        hint = "run on device 'cpu', or choose another backend"
        raise ConfigError(f"the onnx backend runs on a CPU only, not on {device!r}", field="backend", hint=hint)
    if backend == "onnx":
        from vila.engine.onnx.program import find_runtime

        find_runtime()


def _onnx_only(field: str, value: int, hint: str = "leave it out, or choose the onnx backend") -> ConfigError:
    return ConfigError("an option of the onnx backend", field=field, value=value, hint=hint)


def choose_program(
    model: VilaForConditionalGeneration,
    backend: str = "auto",
    *,
    head_bits: int = 0,
    activation_bits: ActivationBits | Literal[0] = 0,
    threads: int = 0,
    events: Events = SILENT,
) -> OnnxProgram | None:
    """What computes the LLM of a model; None leaves it to torch, whose 4-bit product is chosen here too.

    backend:         `auto` takes onnxruntime for a 4-bit model on a CPU where it is installed, else torch.
    head_bits:       of the onnx backend; 0 is 8 for a 4-bit model, else 32.
    activation_bits: of the onnx backend, see OnnxProgram; 0 is 8.
    threads:         of the onnx backend; 0 for as many as torch uses.

    The choice is said to `events` when there was one to make. Raises ConfigError as `check_backend` does, when
    onnxruntime was asked for and cannot compute this model, and for bits of activations that torch would not heed.
    """
    device = model.device.type
    check_backend(backend, head_bits, threads, device, activation_bits)
    four_bit = bool(int4_weights(model))
    why = "" if backend != "auto" else _why_not_onnx(four_bit, device)
    if backend != "torch" and not why:
        from vila.engine.onnx.program import OnnxProgram

        bits: HeadBits = head_bits or (8 if four_bit else 32)  # type: ignore[assignment]
        try:
            program = OnnxProgram(model, head_bits=bits, activation_bits=activation_bits or 8, threads=threads)
        except ConfigError as error:
            if backend != "auto":
                raise
            why = str(error)
        else:
            kind = f"4-bit weights, activations of {program.activation_bits} bits" if four_bit else "float32"
            events.log(f"backend: onnx on cpu, {program.threads} threads, {kind}, head of {bits} bits")
            return program
    if activation_bits:
        raise ConfigError(
            f"activation_bits={activation_bits} is an option of backend='onnx', and torch computes this model: {why}; "
            "leave it out, or ask for that backend"
        )
    if four_bit:
        if why:
            events.log(f"backend: torch; not onnx: {why}")
        use_backend(model, "auto", dtype=model.get_input_embeddings().weight.dtype, events=events)  # type: ignore[arg-type]
    elif backend == "torch":
        events.log(f"backend: torch on {device}, {_short(model.dtype)}")
    return None


def choose_cuda_graph(model: VilaForConditionalGeneration, events: Events = SILENT) -> bool:
    """Whether torch's steps are captured: on one CUDA device, with rotary angles that do not depend on the length."""
    if model.device.type != "cuda":
        return False
    why = ""
    rope = (getattr(model.config.text_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        why = f"rope_type={rope!r} asks the host how long the sequence is"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        why = "the model lies on several devices"
    events.log(f"decoding: steps are {'not captured: ' + why if why else 'captured as graphs'}")
    return not why


def choose_fast_decoder(model: VilaForConditionalGeneration) -> FastDecoder | None:
    """What takes torch's steps in place of the model's own decoder: on a CPU, for blocks that are known."""
    return None if unsupported_reason(model) else FastDecoder(model)


def _why_not_onnx(four_bit: bool, device: str) -> str:
    """Why `auto` leaves a model to torch; empty when it does not."""
    if not four_bit:
        return "the weights are not 4-bit"
    if device != "cpu":
        return f"the model is on {device}"
    from vila.engine.onnx.program import find_runtime

    try:
        find_runtime()
    except ConfigError as error:
        return str(error)
    return ""


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
