#!/usr/bin/env bash
# Puts a headless browser and what drives it on a Debian or Ubuntu machine (as root); nothing if one is there.
set -euo pipefail
for program in chromium chromium-browser google-chrome; do
  if command -v "$program" > /dev/null && command -v chromedriver > /dev/null; then exit 0; fi
done
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null
