# SPDX-License-Identifier: Apache-2.0
"""`python -m tierd`."""

from tierd.cli import main

main()
