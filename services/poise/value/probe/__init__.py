"""The probe: its inputs, window, fit and diagnostics."""
