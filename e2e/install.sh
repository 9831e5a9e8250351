#!/usr/bin/env bash
# Installs the Debian packages that the tests need. Without root it only says which are missing.
set -euo pipefail
missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
export PATH="$PATH:/usr/sbin:/sbin"
need go golang-go
need gcc gcc # the race detector needs cgo
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
need git git
need npm npm
need mosquitto mosquitto
need mosquitto_sub mosquitto-clients
need ip iproute2
need iptables iptables
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ]; then
  echo "missing: ${missing[*]}. Run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi
if ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]}. This system has no apt-get: install them its own way." >&2
  exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The packages' own services must not start here.
[ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
