"""What the self-test of the tools image imports at the end of its build, tried before an image is built."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Runs the part of the self-test that imports modules, with every package hidden that the image does not have.
CODE = """
import importlib, importlib.metadata, re, sys
from pathlib import Path

image, root = sys.argv[1], Path(sys.argv[2])
plain = lambda name: re.sub("[-_.]+", "-", name.lower())
pins = (root / "images" / image / "constraints.txt").read_text().splitlines()
installed = {plain(line.split("==")[0]) for line in pins if "==" in line} | {"kfp-rlhf"}
of_package = importlib.metadata.packages_distributions()
hidden = {package for package, names in of_package.items() if not installed & set(map(plain, names))}
assert {"kfp", "pytest"} <= hidden

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
sys.path.insert(0, str(root / "images"))
import selftest
for module in selftest.modules_of(image):
    try:
        importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{module}: {error}")
print(len(selftest.modules_of(image)))
"""


def test_modules_of_the_tools_image_need_only_its_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "tools", str(ROOT)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
