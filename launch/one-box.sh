#!/bin/bash
# Trains on every GPU of this machine, on the CPU with one rank; again after a crash:
#
#   launch/one-box.sh experiment=digits
#   RANKS=2 launch/one-box.sh experiment=digits run.dir=runs/mine
#
# `ddptrain train` does the same without torchrun, and starts its ranks faster. Ctrl-C saves and
# stops, with a traceback of torchrun's; the same command with the same run.dir goes on.
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=1
exec python -m torch.distributed.run --standalone --nproc-per-node="${RANKS:-$gpus}" \
  --max-restarts="${MAX_RESTARTS:-3}" -m ddptrain "$@"
