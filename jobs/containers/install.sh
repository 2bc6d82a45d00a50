#!/bin/bash
# install.sh system | python | project: what the Dockerfile and mirai-ds.def do, one after the other, as root in the image.
# $MIRAI_ROOT holds requirements-lock.txt and source/ beforehand, afterwards venv/ and $MIRAI_DS_PREBUILT, and no source/.
set -euo pipefail
case ${1:-} in
system) # a C++ compiler and Python's headers are for torch.compile, which compiles in a run
  apt-get update
  apt-get install -y --no-install-recommends g++ python3-dev python3-venv
  rm -rf /var/lib/apt/lists/*
  ;;
python)
  python3 -m venv "$MIRAI_ROOT/venv"
  DS_BUILD_OPS=0 "$MIRAI_ROOT/venv/bin/pip" install --no-cache-dir --no-deps -r "$MIRAI_ROOT/requirements-lock.txt"
  ;;
project) # the kernels of every x86-64 processor, and of the GPUs in $TORCH_CUDA_ARCH_LIST
  python=$MIRAI_ROOT/venv/bin/python
  "$python" -m pip install --no-cache-dir --no-deps --no-build-isolation "$MIRAI_ROOT/source"
  rm -r "$MIRAI_ROOT/source"
  cd /
  for unit in default avx2 avx512; do
    ATEN_CPU_CAPABILITY=$unit "$python" -m mirai_ds.kernels.build cpu --into "$MIRAI_DS_PREBUILT"
  done
  "$python" -m mirai_ds.kernels.build cuda --into "$MIRAI_DS_PREBUILT"
  ;;
*)
  echo "install.sh system | python | project" >&2
  exit 2
  ;;
esac
