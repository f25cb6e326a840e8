"""The verb convert: a trained adapter in another form. Imported as surgery.converters."""
