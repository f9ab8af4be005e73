#!/bin/sh
# Installs the browser that tests/inside/test_browser.py opens, where none is there and this user
# may. Otherwise says what is missing; the test then is skipped.
set -eu
for program in chromium chromium-browser google-chrome; do
    if command -v "$program" >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: chromium chromium-driver (Debian packages, installed by root)" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 \
    chromium chromium-driver >/dev/null
