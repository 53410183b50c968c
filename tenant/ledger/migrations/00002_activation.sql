-- +goose Up
-- SHA-256 of the attestation key that the host's TPM has proved to hold.
ALTER TABLE hosts ADD COLUMN activated TEXT NOT NULL DEFAULT '';

-- +goose Down
SELECT 'the ledger is never migrated down';
