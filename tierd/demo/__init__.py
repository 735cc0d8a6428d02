# SPDX-License-Identifier: Apache-2.0
"""A real virtual machine to try tierd on: a small guest that can check its own memory, and a script that shows tierd at work."""
