"""What a run resolves to on a GPU that is not there: for tests of the choices that are made after it."""

from raychat.training.device import Resolved

RESOLVED = Resolved(
    device_type="cuda",
    device_name="A GPU",
    hardware="A GPU, 1 threads, torch 2",
    dtype="bfloat16",
    dtype_reason="",
    attention="sdpa",
    attention_reason="",
    loss="full",
    compile=True,
    threads=1,
)
