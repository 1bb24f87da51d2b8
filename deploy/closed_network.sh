#!/usr/bin/env bash
# Closes the LAN and metadata addresses to Compose's network `outside`: run it once as root after each
# boot, and after Docker was restarted. It needs iptables, and adds each rule once.
#
# Docker sends what its networks forward through the chain DOCKER-USER first. Name servers are asked
# through Docker's own at 127.0.0.11, which does not pass there. Everything else private is refused.
set -euo pipefail
bridge=${1:-ralf-outside}
for block in 10.0.0.0/8 100.64.0.0/10 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.168.0.0/16 224.0.0.0/4; do
  rule=(-i "$bridge" -d "$block" -m conntrack --ctstate NEW -j REJECT)
  ${IPTABLES:-iptables} -C DOCKER-USER "${rule[@]}" 2>/dev/null || ${IPTABLES:-iptables} -I DOCKER-USER "${rule[@]}"
  # The machine itself is an address of its LAN too.
  ${IPTABLES:-iptables} -C INPUT "${rule[@]}" 2>/dev/null || ${IPTABLES:-iptables} -I INPUT "${rule[@]}"
done
