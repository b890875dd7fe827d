#!/usr/bin/env bash
# Runs on every worker of cluster.yaml: tells Ray when EC2 is about to take this spot node, two minutes before it does, so that a run
# commits what it has.   spot-notice.sh HEAD:PORT
set -u
metadata=${METADATA:-http://169.254.169.254}
while true; do
  token=$(curl -sf -m 2 -X PUT "$metadata/latest/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 60")
  # 404 until there is a notice
  if curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"; then
    node=$(python -c "import ray; ray.init(address='$1', logging_level='ERROR', log_to_driver=False); print(ray.get_runtime_context().get_node_id())")
    ray drain-node --address "$1" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
      --reason-message spot --deadline-remaining-seconds 100 && exit 0
  fi
  sleep "${EVERY:-5}"
done
