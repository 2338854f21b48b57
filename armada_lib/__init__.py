"""ARMADA: distil a frozen text-to-image, -video or -audio teacher into a language-only student."""

__version__ = "0.1.0"
