"""edge-vla, the reference policy: MobileNetV3-class vision, LSTM language, MLP head, action chunks."""
