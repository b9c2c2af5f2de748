#!/usr/bin/env bash
# Two hosts on one machine: step time and bytes on the wire of a backbone replicated, sharded over all ranks and sharded
# inside each host, and of PEFT with ZeRO-3. The hosts are network namespaces joined by a veth pair limited by tc; what
# runs on them is real TCP through gloo, started on each by DeepSpeed's own launcher.
#
#     sudo PYTHON=.venv/bin/python benchmarks/two_nodes.sh [OUTPUT.json] [SYSTEM …]
#
# SYSTEM: ptd-none ptd-world ptd-node (backbone.sharding) peft-world; default: all. Needs root, ip and tc. What is
# measured, and how: two_nodes.py beside this file.
set -euo pipefail
cd "$(dirname "$0")/.."

output=${1:-benchmarks/results/two_nodes.json}
shift || true
systems=("$@")
[ ${#systems[@]} -gt 0 ] || systems=(ptd-none ptd-node ptd-world peft-world)
rates=(1gbit 200mbit)
ranks_a_node=2
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
device=veth0
hosts=("ptd-$$-0" "ptd-$$-1")
addresses=(10.77.0.1 10.77.0.2)

fail() { echo "two_nodes.sh: $1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "network namespaces need root; run it with sudo"
for tool in ip tc; do command -v "$tool" >/dev/null || fail "$tool is missing; install iproute2"; done
[ -x "$python" ] || fail "$python is not there; make test creates .venv, PYTHON=… names another"

work=$(mktemp -d)
cleanup() {
  local host processes
  for host in "${hosts[@]}"; do
    processes=$(ip netns pids "$host" 2>/dev/null || true)
    [ -z "$processes" ] || kill -9 $processes 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

for host in "${hosts[@]}"; do ip netns add "$host"; done
ip link add "$device" netns "${hosts[0]}" type veth peer name "$device" netns "${hosts[1]}"
for node in 0 1; do
  ip -n "${hosts[$node]}" link set lo up
  ip -n "${hosts[$node]}" address add "${addresses[$node]}/24" dev "$device"
  ip -n "${hosts[$node]}" link set "$device" up
  tc -n "${hosts[$node]}" qdisc add dev "$device" root tbf rate "${rates[0]}" burst 256kb latency 50ms \
    || fail "this kernel has no tbf queueing discipline"
  echo "${hosts[$node]} slots=$ranks_a_node" >>"$work/hostfile"
done

export GLOO_SOCKET_IFNAME=$device OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export HF_DATASETS_CACHE="$work/datasets"
"$python" benchmarks/two_nodes.py prepare "$work"

port=29500
for system in "${systems[@]}"; do
  echo "== $system" >&2
  port=$((port + 1))
  started=()
  for node in 0 1; do
    ip netns exec "${hosts[$node]}" "$(dirname "$python")/deepspeed" --hostfile "$work/hostfile" --no_ssh \
      --node_rank "$node" --master_addr "${addresses[0]}" --master_port "$port" --no_local_rank \
      benchmarks/two_nodes.py run "$system" "$work" "$device" "${hosts[*]}" "${rates[*]}" \
      >"$work/$system-$node.log" 2>&1 &
    started+=($!)
  done
  for process in "${started[@]}"; do
    wait "$process" || { tail -n 40 "$work/$system"-*.log >&2; fail "$system broke off"; }
  done
done
"$python" benchmarks/two_nodes.py report "$work" "$output" "${systems[@]}"
