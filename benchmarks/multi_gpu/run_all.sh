#!/usr/bin/env bash
# Layouts compared, speed, and a training, on N GPUs of this host, within a time.
#   benchmarks/multi_gpu/run_all.sh N OUT [SECONDS] [PART ...]
# PART is any of: correctness speed train; without any, all. SECONDS (580) are shared out over the parts.
# Leaves in OUT cards, loss curve, report, a summary and logs.tar.gz, and goes on when a part fails;
# ends with 1 if one did. PYTHON names the interpreter; DEVICE=cpu and EXTRA=--tiny try it over gloo;
# WORK is a fast disk for checkpoints; CORRECTNESS_OPTIONS, SPEED_OPTIONS, TRAIN_OPTIONS go to the parts.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
if [ $# -lt 2 ]; then
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
fi
gpus=$1 seconds=${3:-580}
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift $(($# < 3 ? $# : 3))
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(correctness speed train)
python=${PYTHON:-python3}

# Multicast through NVLink switches (NVLS) needs drivers that a host with several tenants may not
# have set up, and NCCL, torch and NVSHMEM would take it by themselves.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

work=$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/multi_gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
end=$((SECONDS + seconds))
device=${DEVICE:-cuda}
common=(--device "$device" --results-dir "$out")
read -ra extra <<< "${EXTRA:-}"
read -ra correctness_options <<< "${CORRECTNESS_OPTIONS:-}"
read -ra train_options <<< "${TRAIN_OPTIONS:-}"
read -ra speed_options <<< "${SPEED_OPTIONS:-}"
summary=$out/summary.txt
: > "$summary"
failed=0

counts=(1)
for ((count = 2; count <= gpus; count *= 2)); do counts+=("$count"); done

for index in "${!parts[@]}"; do
  part=${parts[index]}
  name=${part}_${gpus}_${device}
  # What is left, shared with the parts to come; a training uses all it gets.
  share=$(((end - SECONDS) / (${#parts[@]} - index)))
  began=$SECONDS
  arguments=("${common[@]}" --name "$name" --seconds "$share" "${extra[@]}")
  case $part in
    correctness)
      arguments+=(--processes "$gpus" --work "$work/correctness" "${correctness_options[@]}") ;;
    speed) arguments+=(--processes "${counts[@]}" --work "$work/speed" "${speed_options[@]}") ;;
    train) arguments+=(--processes "$gpus" --work "$work" "${train_options[@]}") ;;
    *) echo "no such part: $part" >&2; exit 2 ;;
  esac
  # The scripts keep to their time by themselves; this is for one that does not.
  timeout --kill-after=10 $((share + 20)) "$python" -m "benchmarks.multi_gpu.$part" "${arguments[@]}" \
    > >(tee "$work/$part.log") 2>&1
  code=$?
  [ $code -eq 0 ] || failed=1
  {
    echo "== $part: exit code $code after $((SECONDS - began)) s of $share"
    grep -vi 'warn' "$work/$part.log" | tail -n 40
  } >> "$summary"
done

find "$work" "$out" -name '*.log' -print0 | tar --null -czf "$out/logs.tar.gz" --absolute-names -T -
rm -f "$out"/*.log
cat "$summary"
exit $failed
