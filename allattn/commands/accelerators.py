"""An accelerator that is there and that JAX cannot use, as its build is for CPUs."""

import os
import shutil
import sys

# What the driver of NVIDIA's GPUs leaves where it is loaded.
NVIDIA_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0")
# The chips of a Cloud TPU VM.
TPU_FILES = ("/dev/accel0",)


def say_if_unused() -> None:
    """One line on standard error if this machine has an accelerator and JAX is on the CPU."""
    import jax

    # Whoever names the platform knows.
    if os.environ.get("JAX_PLATFORMS") or jax.process_index():
        return
    # Files are there where the driver is, the program where it may be reached by another way.
    nvidia = any(map(os.path.exists, NVIDIA_FILES)) or shutil.which("nvidia-smi") is not None
    tpu = any(map(os.path.exists, TPU_FILES))
    text = remark(jax.default_backend(), nvidia, tpu, jax.__version__)
    if text:
        print(f"allattn: {text}", file=sys.stderr, flush=True)


def remark(backend: str, nvidia: bool, tpu: bool, version: str) -> str:
    """What to do about an accelerator that is not used.

    Args:
      backend: the platform that JAX has chosen.
      nvidia: whether the machine has an NVIDIA GPU.
      tpu: whether it has TPU chips.
      version: of JAX.

    Returns:
      One line, or "" where all is as it should be.
    """
    if backend != "cpu":
        return ""
    for present, name, extra in ((nvidia, "an NVIDIA GPU", "cuda12"), (tpu, "a TPU", "tpu")):
        if present:
            return (
                f"this machine has {name}, and this JAX is built for CPUs alone: training on the "
                f"CPU; to change it: {sys.executable} -m pip install 'jax[{extra}]=={version}'"
            )
    return ""
