-- +goose Up
-- Orders to audit a host's TPM from trusted media, and what came of them. An order serves
-- once. A host whose last audit failed gets no VM, whatever it quotes.
CREATE TABLE host_audits (
    number   TEXT PRIMARY KEY, -- hex
    host     TEXT NOT NULL,
    ordered  BLOB NOT NULL,    -- JSON of hostaudit.Order
    key      BLOB NOT NULL,    -- public key of the medium
    answer   TEXT NOT NULL,    -- SHA-256 of what the TPM must answer
    expires  INTEGER NOT NULL,
    judged   INTEGER NOT NULL, -- 0: no report yet
    failed   TEXT NOT NULL,    -- JSON of the findings; '' for a good one
    report   BLOB NOT NULL     -- JSON of the signed report
) STRICT;
ALTER TABLE hosts ADD COLUMN audit_failed TEXT NOT NULL DEFAULT ''; -- why its last audit failed

-- +goose Down
SELECT 'the ledger is never migrated down';
