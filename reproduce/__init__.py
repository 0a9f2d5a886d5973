"""The experiments of Koh & Liang (ICML 2017), one module each: ``python -m reproduce.NAME``."""
