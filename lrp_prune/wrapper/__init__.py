"""The LightningModule around a user's module that carries patches, and what it hands on."""
