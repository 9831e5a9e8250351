#!/usr/bin/env bash
# Fuzzes every target of the repository, or those named TARGET, for FUZZTIME (1m) each, one after another. It finds the targets
# by itself and prints a line for each. What it finds stands below testdata/fuzz of the package: commit it with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
FUZZTIME=${FUZZTIME:-1m}
pattern="^${TARGET:-Fuzz.*}$"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ran=0 failed=0
while read -r dir; do
  while read -r target; do
    ran=$((ran + 1)) start=$SECONDS
    result=ok
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$FUZZTIME" "./$dir" >"$log" 2>&1 || result=FAILED
    # The last line of progress: "fuzz: elapsed: 1m0s, execs: 1234 (20/sec), new interesting: 5 (total: 9)".
    progress=$(sed -n 's/^fuzz: elapsed: .*, \(execs: [0-9]*\) (.*), \(new interesting: [0-9]*\) (.*/\1, \2/p' "$log" | tail -n 1)
    printf '%-28s %-22s %5d s  %s  %s\n' "$dir" "$target" $((SECONDS - start)) "$result" "${progress:-no progress told}"
    if [ $result = FAILED ]; then
      failed=$((failed + 1))
      sed 's/^/    /' "$log"
      input=$(sed -n 's/^ *Failing input written to //p' "$log" | tail -n 1)
      [ -z "$input" ] || printf '    the input: %s\n    repeat with: go test -run=%s ./%s\n' "$dir/$input" "$target/${input##*/}" "$dir"
    fi
  done < <(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*/\1/p' "$dir"/*_test.go | grep -E "$pattern" | sort)
done < <(git grep -lE '^func Fuzz' -- '*_test.go' | xargs -n 1 dirname | sort -u)
[ $ran -gt 0 ] || { echo "no target is named $TARGET" >&2; exit 2; }
echo "$ran targets, $failed failed"
[ $failed = 0 ]
