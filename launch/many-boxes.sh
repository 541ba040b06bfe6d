#!/bin/bash
# Trains on several machines that reach each other; start it on each of them, in any order:
#
#   launch/many-boxes.sh 10.0.0.1 experiment=digits run.dir=/shared/digits
#
# First comes the address of one of them, in numbers, where all meet. NODES=2:4 is how few and how many
# there may be: all but that one may come late, leave, and come back, and the run goes on with those that
# are there. It waits launch.timeout seconds (600) for enough, and names who came if too few do; and WAIT
# seconds (10) for more. run.dir is a folder that all see. PORT (29400) and RANKS may be set as well.
set -euo pipefail
[[ ${1:-} =~ ^([0-9.]+|[0-9a-fA-F.]*:[0-9a-fA-F.:]*)$ ]] ||
  { echo "usage: $0 ADDRESS [doctor] KEY=VALUE …; an address in numbers, no name" >&2 && exit 2; }
meet=$1 timeout=600 && shift
[[ ${1:-} != doctor ]] || MAX_RESTARTS=0
for key in "$@"; do [[ ! $key =~ ^launch.timeout=([0-9]+) ]] || timeout=${BASH_REMATCH[1]}; done
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Its rendezvous comes with ddptrain, and is torchrun's c10d with errors that name the machines.
exec python -m torch.distributed.run --nnodes="${NODES:-1:4}" --nproc-per-node="${RANKS:-$gpus}" \
  --max-restarts="${MAX_RESTARTS:-3}" --rdzv-backend=ddptrain --rdzv-endpoint="$meet:${PORT:-29400}" \
  --rdzv-conf="join_timeout=$timeout,last_call_timeout=${WAIT:-10}" -m ddptrain "$@"
