"""Model families as MindSpore Cells. Nothing here knows file formats or foreign tensor names."""
