#!/bin/sh
# Screenshots of the built site at the width of a desk and of a telephone: make docs && sh docs/screenshots.sh
set -eu
cd "$(dirname "$0")"
mkdir -p _static/screenshots

shoot() {
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size="$2" \
        --screenshot="_static/screenshots/$3.png" "file://$PWD/_build/html/$1.html"
}

shoot start 390,1400 start-390
shoot penalties/grad_norm 1280,1400 grad_norm-1280
shoot guide/integrations 1280,1400 integrations-1280
