#!/bin/sh
# Gets ONNX Runtime's library from the npm package onnxruntime-node and puts it where longshore-worker looks for it.
#
#   get-onnxruntime.sh [amd64|arm64 [FOLDER]]
#
# Without arguments: this machine's architecture, into $LONGSHORE_CACHE/onnxruntime (default: longshore in the user's cache
# folder). With them: the library of another architecture, to be copied beside longshore-worker on an edge.
set -eu

version=1.24.1
library=libonnxruntime.so.1

say() { echo "onnxruntime: $*" >&2; }
die() { say "$*"; exit 1; }

machine=${1:-$(uname -m)}
case $machine in
amd64 | x86_64)
	folder=x64
	sha256=53ef1ac028dd1b05554b8da28d9159eb3876f99868193d2aaa6e67f0243c23d4
	;;
arm64 | aarch64)
	folder=arm64
	sha256=7954e8bdedb497f830c6a679e818d98399b7f4d81ade1126c3e0be74d28111ab
	;;
*) die "there is no ONNX Runtime for $machine; models run on GoMLX or, on 32-bit arm, not at all" ;;
esac

cache=${LONGSHORE_CACHE:-${XDG_CACHE_HOME:-${HOME:?is not set; set LONGSHORE_CACHE}/.cache}/longshore}
target=${2:-$cache/onnxruntime}

check() { echo "$sha256  $1" | sha256sum --check --status 2>/dev/null; }

if [ -f "$target/$library" ] && check "$target/$library"; then
	say "$target/$library is there (version $version)"
	exit 0
fi
command -v npm >/dev/null || die "npm is needed to get onnxruntime-node@$version: install it (Debian: apt-get install npm), or put $library into $target yourself"

mkdir -p "$target"
work=$(mktemp -d "$target/.get.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

say "getting onnxruntime-node@$version (86 MB) with npm"
(cd "$work" && npm pack --silent "onnxruntime-node@$version" >/dev/null) || die "npm could not get onnxruntime-node@$version; is there a network and a registry (npm config get registry)?"
tar -xzf "$work/onnxruntime-node-$version.tgz" -C "$work" "package/bin/napi-v6/linux/$folder/$library"
new="$work/package/bin/napi-v6/linux/$folder/$library"
check "$new" || die "the library from npm has another SHA-256 than expected ($sha256); nothing was installed"
chmod 755 "$new"
mv -f "$new" "$target/$library"
say "installed $target/$library (version $version)"
