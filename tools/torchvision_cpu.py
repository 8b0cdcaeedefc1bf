"""Makes torchvision importable in this environment when a CUDA build of it sits beside a CPU build of torch.

Only torchvision's Python side (image transforms) is used, but importing it registers fake kernels for two operators
that its compiled library would have declared. A .pth file declares them first, in every process: vLLM and Ray start
many. Does nothing where torchvision imports as it is. Run by `make setup`.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''\
"""Declares two operators before torchvision is imported (see tools/torchvision_cpu.py)."""
import importlib.abc
import sys


class _DeclareOps(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global _library
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DeclareOps())
'''


def imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0


def main() -> None:
    if imports():
        return
    site = Path(sysconfig.get_paths()["purelib"])
    (site / "megatron_agent_torchvision.py").write_text(HOOK)
    (site / "megatron_agent_torchvision.pth").write_text("import megatron_agent_torchvision\n")
    if not imports():
        sys.exit("torchvision cannot be imported beside this torch; install builds of one kind (CPU or CUDA) of both")


if __name__ == "__main__":
    main()
