"""Pierrot, Perrin-Gilbert and Sigaud (2021): six methods as −M⁻¹ ∂loss with six matrices M, where they coincide and where they differ."""
