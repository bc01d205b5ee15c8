"""What a program begins with that runs a package of AOTInductor and can import neither surgeon nor transformers."""

ALONE = """
import importlib.abc, json, sys
class Forbidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("surgeon", "transformers"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Forbidden())
import torch
package = torch._inductor.aoti_load_package(sys.argv[1])
"""
