#!/bin/bash
# Trains on several machines that reach each other; start it on each of them, in any order:
#
#   launch/many-boxes.sh 10.0.0.1 experiment=digits run.dir=/shared/digits
#
# First comes the address of one of them, in numbers, where all meet. NODES=2:4 is how few and how many
# there may be: a machine may come late, leave, and come back, and the run goes on with those that are
# there. It waits TIMEOUT seconds for enough, and WAIT for more. run.dir is a folder that all see. PORT
# and RANKS may be set as well; RUN_ID, the same on all, where several such runs meet at one address.
set -euo pipefail
[[ ${1:-} =~ ^([0-9.]+|[0-9a-fA-F.]*:[0-9a-fA-F.:]*)$ ]] ||
  { echo "usage: $0 ADDRESS [doctor] KEY=VALUE …; an address in numbers, no name" >&2 && exit 2; }
meet=$1 && shift
[[ ${1:-} != doctor ]] || MAX_RESTARTS=0
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=1
here=$(ip -o route get "$meet" | sed -n 's/.* src \([^ ]*\).*/\1/p') # the way to there is our own
port=${PORT:-29400} nodes=${NODES:-1:4} is_host=0
[[ $here != "$meet" ]] || is_host=1
if ((is_host)) && (: <"/dev/tcp/$here/$port") 2>/dev/null; then
  echo "port $port is taken on $here: set PORT, the same on all machines" >&2 && exit 2
fi
echo "waits at $meet, port $port, for $nodes machines" >&2
# Or torchrun leaves machines that come late waiting for an address that it has told already.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
waits="join_timeout=${TIMEOUT:-600},last_call_timeout=${WAIT:-10}"
exec python -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="${RANKS:-$gpus}" \
  --max-restarts="${MAX_RESTARTS:-3}" --rdzv-backend=c10d --rdzv-id="${RUN_ID:-ddptrain}" \
  --rdzv-endpoint="$meet:$port" --rdzv-conf="is_host=$is_host,$waits" --local-addr="$here" -m ddptrain "$@"
