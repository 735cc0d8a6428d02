# SPDX-License-Identifier: Apache-2.0
"""tierd: memory tiering for VM hosts."""

__version__ = "0.1.0"
