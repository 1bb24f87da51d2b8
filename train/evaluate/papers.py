"""Figures that papers published, to print beside ours where the data is the same.

AUC, accuracy and EER are in percent, as printed.  A row is shown only for the dataset and
compression that it was measured on.  Protocols still differ (the papers take one random frame of
each video), and each table says so.  The source is RALF's Tables 1 to 6.
"""

PROTOCOL = "published rows: one frame a video, trained as their papers say; ours: see the columns"

INTRA: dict[tuple[str, str], dict[str, tuple[float | None, float | None]]] = {
    ("ffpp", "c23"): {
        "MesoNet": (83.10, None),
        "Xception": (95.73, None),
        "Face X-ray": (None, 87.35),
        "Add-Net": (96.78, 97.74),
        "Two-branch": (96.43, 98.70),
        "SPSL": (91.50, 95.32),
        "FDFL": (96.69, 99.30),
        "F3-Net": (97.52, 98.10),
        "Multi-att": (97.60, 99.29),
        "PEL": (97.63, 99.32),
        "RALF": (94.71, 98.92),
    },
    ("ffpp", "c40"): {
        "MesoNet": (70.47, None),
        "Xception": (86.86, None),
        "Face X-ray": (None, 61.60),
        "Add-Net": (87.50, 91.01),
        "Two-branch": (86.34, 86.59),
        "SPSL": (81.57, 82.82),
        "FDFL": (89.00, 92.40),
        "F3-Net": (90.43, 93.30),
        "Multi-att": (88.69, 90.40),
        "PEL": (90.52, 94.28),
        "RALF": (83.94, 89.06),
    },
}
"""Accuracy and AUC."""

CROSS: dict[str, dict[str, tuple[float, float]]] = {
    "celeb_df_v2": {
        "Xception": (60.05, 43.19),
        "Add-Net": (57.83, 44.44),
        "F3-Net": (67.95, 36.76),
        "Multi-att": (68.64, 37.08),
        "PEL": (69.18, 35.69),
        "RALF": (71.00, 34.70),
    },
    "dfdc": {
        "Xception": (55.65, 46.05),
        "Add-Net": (51.60, 54.77),
        "F3-Net": (57.87, 44.23),
        "Multi-att": (63.02, 40.98),
        "PEL": (63.31, 40.43),
        "RALF": (63.94, 39.21),
    },
}
"""AUC and EER, trained on FaceForensics++ c40."""

ROBUSTNESS: dict[str, tuple[float, float, float, float]] = {
    "Xception": (-0.66, -12.76, -3.59, -17.04),
    "F3-Net": (-2.14, -11.74, -6.72, -18.26),
    "RALF": (-0.40, -8.61, -2.85, -8.37),
}
"""Change of AUC under contrast, blur, rescale and pixelation at level 2, FaceForensics++ c23."""

ABLATION: dict[str, float] = {
    "RALF without L_emb": 85.43,
    "RALF without L_con": 86.34,
    "RALF without L_freq": 88.29,
    "RALF, L_freq unweighted": 88.59,
    "RALF": 89.06,
}
"""AUC on FaceForensics++ c40."""

BACKBONE: dict[str, float] = {
    "RALF ResNet-18": 84.30,
    "RALF ResNet-50": 85.60,
    "RALF Xception": 89.06,
}
"""AUC on FaceForensics++ c40."""

POOLING: dict[str, dict[str, float]] = {
    "ffpp": {"RALF average pooling": 88.84, "RALF max pooling": 89.05},
    "celeb_df_v2": {"RALF average pooling": 69.78, "RALF max pooling": 71.00},
    "dfdc": {"RALF average pooling": 58.24, "RALF max pooling": 63.94},
}
"""AUC; FaceForensics++ is c40."""
