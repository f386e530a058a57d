#!/bin/sh
# Builds a recipe, verifies and measures its artifact, and publishes it only when every gate and assertion held.
#
#     RECIPE=recipes/edge-vla/cpu.yaml ASSERT="p99_ms<40 miss_rate<0.001" PUBLISH=/srv/policies scripts/ci.sh
#
#     RECIPE    the recipe to build, for this machine
#     SET       other values for it, as in --set: "bench.hz=50 quantize.scheme=int8"
#     RESULTS   folder for what a build server keeps: bench.xml (JUnit), record.json, report.html, summary.md
#     HZ        control rate, DURATION seconds of the paced run, LOAD busy processes beside it; the recipe's otherwise
#     ASSERT    limits on the measurement, as in `vlaopt bench --assert`; none of them may hold a blank
#     STORED    the record.json of an earlier job on this machine, to compare with; optional
#     COMPARE   limits on the comparison with STORED, as in `vlaopt compare --assert`
#     PUBLISH   folder that gets <name>/<version>/<target>/ with the artifact, its record and its report; optional
#     VLAOPT    the command
#
# The exit code is that of the first step that failed: 2 recipe or input, 3 this machine cannot, 4 a stage, 5 a gate or an
# assertion. The results are written whenever there was something to measure. The last line of stdout is the folder that
# was published, or the artifact's where PUBLISH is not set.
set -euf

RECIPE=${RECIPE:-recipes/edge-vla/cpu.yaml}
SET=${SET:-}
RESULTS=${RESULTS:-build/ci}
HZ=${HZ:-}
DURATION=${DURATION:-}
LOAD=${LOAD:-}
ASSERT=${ASSERT:-verdict!=INVALID}
STORED=${STORED:-}
COMPARE=${COMPARE:-answer!=SLOWER}
PUBLISH=${PUBLISH:-}
VLAOPT=${VLAOPT:-vlaopt}

code=0

# Run a step; the first one that fails decides the exit code, and the steps after it still run.
step() {
    "$@" || { failed=$?; [ "$code" -ne 0 ] || code=$failed; }
}

mkdir -p "$RESULTS"
rm -f "$RESULTS/bench.xml" "$RESULTS/record.json" "$RESULTS/report.html" "$RESULTS/summary.md"

set -- build "$RECIPE" --output "$RESULTS/artifacts"
for value in $SET; do set -- "$@" --set "$value"; done
"$VLAOPT" "$@" > "$RESULTS/build.txt"
cat "$RESULTS/build.txt"
artifact=$(tail -n 1 "$RESULTS/build.txt")

"$VLAOPT" verify "$artifact"

set -- bench "$artifact" --record "$RESULTS/record.json" --junit "$RESULTS/bench.xml"
[ -z "$HZ" ] || set -- "$@" --hz "$HZ"
[ -z "$DURATION" ] || set -- "$@" --duration "$DURATION"
[ -z "$LOAD" ] || set -- "$@" --with-load "$LOAD"
for limit in $ASSERT; do set -- "$@" --assert "$limit"; done
step "$VLAOPT" "$@"
[ -f "$RESULTS/record.json" ] || exit "$code"

if [ -n "$STORED" ]; then
    set -- compare "$STORED" "$RESULTS/record.json"
    for limit in $COMPARE; do set -- "$@" --assert "$limit"; done
    step "$VLAOPT" "$@"
fi

step "$VLAOPT" report "$artifact" --record "$RESULTS/record.json" --output "$RESULTS/report.html"
step "$VLAOPT" report "$artifact" --record "$RESULTS/record.json" --markdown > "$RESULTS/summary.md"

if [ "$code" -ne 0 ]; then
    echo "not published: see $RESULTS/bench.xml" >&2
    exit "$code"
fi
if [ -z "$PUBLISH" ]; then
    echo "$artifact"
    exit 0
fi

# An artifact lies in <name>/<version>/<target>. It is copied beside its place and renamed: nobody sees half of it.
version=${artifact%/*}
name=${version%/*}
place=$PUBLISH/${name##*/}/${version##*/}/${artifact##*/}
if [ -e "$place" ]; then
    echo "published before, and kept as it was" >&2
else
    staging=$place.staging-$$
    trap 'rm -rf "$staging"' EXIT
    mkdir -p "$staging"
    cp -R "$artifact" "$staging/artifact"
    cp "$RESULTS/record.json" "$RESULTS/report.html" "$RESULTS/bench.xml" "$staging"
    mv "$staging" "$place"
fi
echo "$place"
