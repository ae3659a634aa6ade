"""DeLVM: vision by next-token prediction over the codes of a VQGAN (arXiv 2402.04841)."""
