#!/usr/bin/env bash
# Environments of the peers, one each, because they disagree about numpy and would replace torch.
#   benchmarks/setup_peers.sh [curvlinops] [kronfluence] [pydvl] [dattri] [captum] [trak]
# All by default.
# torch comes first and is pinned; its version is checked again after the peer is in.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0
PYTHON=${PYTHON:-python3}
PIN=$(mktemp)
trap 'rm -f "$PIN"' EXIT
echo "torch==$TORCH" > "$PIN"

prepare() { # name, numpy: an environment with torch
  "$PYTHON" -m venv ".venv-peers/$1"
  ".venv-peers/$1/bin/pip" install -q --disable-pip-version-check "torch==$TORCH" "$2"
}

add() { # name, pip arguments: more packages, torch held where it is
  local name=$1
  shift
  ".venv-peers/$name/bin/pip" install -q --disable-pip-version-check -c "$PIN" "$@"
}

check() { # name, module
  ".venv-peers/$1/bin/python" - "$2" "$TORCH" <<'PY'
import importlib, importlib.util, sys
import torch
module, wanted = sys.argv[1:]
importlib.import_module(module)
if torch.__version__.split("+")[0] != wanted:
    sys.exit(f"torch became {torch.__version__}, wanted {wanted}")
if importlib.util.find_spec("torchvision"):
    sys.exit("torchvision came along: it is tied to another torch")
print(f"{module} with torch {torch.__version__}")
PY
}

# backpack asks for torchvision, which brings another torch; neither is needed here.
curvlinops() {
  prepare curvlinops numpy
  add curvlinops scipy tqdm einops einconv opt-einsum linear_operator
  add curvlinops --no-deps backpack-for-pytorch==1.7.1 unfoldNd curvlinops-for-pytorch==3.0.1
  check curvlinops curvlinops
}

pydvl() {
  prepare pydvl "numpy<2"
  add pydvl "pyDVL[influence]==0.10.0"
  check pydvl pydvl.influence.torch
}

dattri() {
  prepare dattri numpy
  add dattri dattri==0.3.0
  check dattri dattri
}

# It asks for torchvision without ever importing it.
kronfluence() {
  prepare kronfluence numpy
  add kronfluence accelerate einops einconv opt-einsum safetensors tqdm
  add kronfluence --no-deps kronfluence==1.0.1
  check kronfluence kronfluence.analyzer
}

captum() {
  prepare captum numpy
  add captum captum==0.9.0
  check captum captum.influence
}

trak() {
  prepare trak numpy
  add trak traker==0.3.2
  check trak trak
}

for peer in ${@:-curvlinops kronfluence pydvl dattri captum trak}; do
  "$peer"
done
