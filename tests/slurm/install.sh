#!/bin/sh
# Installs what tests/slurm starts a SLURM with, where it is missing and this user may: Debian's
# packages, whose own services stay off. Otherwise says what is missing; the tests then are skipped.
set -eu
packages="munge slurm-wlm slurmdbd mariadb-server"
missing=""
for package in $packages; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
        missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing (Debian packages, installed by root with apt-get)" >&2
    exit 0
fi

# invoke-rc.d asks this program, and starts nothing where it says 101.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Another apt-get may be at work.
# shellcheck disable=SC2086  # a list
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 $missing >/dev/null
