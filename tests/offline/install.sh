#!/usr/bin/env bash
# install.sh [VENV]: a virtual environment with mirai_ds out of this folder alone, no network (default: VENV beside this).
# PYTHON names the interpreter, Python @PYTHON@ (default: python@PYTHON@).  A bundle without torch takes that of PYTHON.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python@PYTHON@}
venv=${1:-$here/venv}
stop() {
  echo "install.sh: $*" >&2
  exit 2
}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || stop "$python: cannot run; set PYTHON"
[ "$version" = @PYTHON@ ] || stop "$python is Python $version, this bundle is for @PYTHON@; set PYTHON"
[ ! -e "$venv" ] || stop "$venv: is there already; give another folder, or remove it"
shopt -s nullglob
torch=("$here"/wheels/torch-*.whl)
if [ ${#torch[@]} -eq 0 ]; then
  others=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])') ||
    stop "this bundle has no torch, and $python has none either; set PYTHON to one that has"
fi
"$python" -m venv "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Behind what is installed here: packages of this bundle come first.
[ ${#torch[@]} -gt 0 ] || echo "$others" >"$site/existing-torch.pth"
"$venv/bin/python" -m pip install --quiet --no-index --no-deps "$here"/wheels/*.whl
[ ! -d "$here/kernels" ] || cp -r "$here/kernels" "$site/mirai_ds/kernels/prebuilt"
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
"$venv/bin/mirai-ds" --version
echo "installed; next: $venv/bin/mirai-ds doctor"
