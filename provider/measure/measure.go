// Package measure extends the host's files into the TPM before they run, and keeps
// the log that replays to the registers.
//
// In production firmware and IMA do this. In the lab the launcher does, once a host
// boot, for each file of the platform in the order of its release: it opens the file,
// measures what it opened, and runs that open file, so nothing can be exchanged in
// between. Nothing measures itself.
package measure

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"foothold/internal/durable"
	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// maxLog bounds an encoded log in bytes: 4096 events of about 200 bytes.
const maxLog = 1 << 20

// File is one file to be measured, open already. Name goes into the log.
type File struct {
	Name string
	File *os.File
}

// Launch measures the files into PCR 10, in order, and returns their events. The
// files' offsets are left at the start. After an error the TPM may hold more than
// the log says, and quotes are refused until the host boots again.
func Launch(t transport.TPM, files []File) ([]pcr.Event, error) {
	events := make([]pcr.Event, 0, len(files))
	for _, f := range files {
		sum, err := hash(f.File)
		if err != nil {
			return nil, fmt.Errorf("measure %s: %w", f.Name, err)
		}
		e := pcr.Event{PCR: pcr.Platform, Digest: sum, Name: f.Name}
		if err := extend(t, e); err != nil {
			return nil, fmt.Errorf("measure %s: %w", f.Name, err)
		}
		events = append(events, e)
	}
	return events, nil
}

func hash(f *os.File) (digest.SHA256, error) {
	var d digest.SHA256
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return d, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return d, err
	}
	h.Sum(d[:0])
	_, err := f.Seek(0, io.SeekStart)
	return d, err
}

func extend(t transport.TPM, e pcr.Event) error {
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{
			HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:],
		}}},
	}.Execute(t)
	return err
}

// WriteLog replaces the log at path.
func WriteLog(path string, events []pcr.Event) error {
	data, err := json.MarshalIndent(events, "", "  ")
	if err != nil {
		return fmt.Errorf("write measurement log: %w", err)
	}
	return durable.WriteFile(path, append(data, '\n'), 0o644)
}

// ReadLog reads what WriteLog wrote.
func ReadLog(path string) ([]pcr.Event, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read measurement log: %w", err)
	}
	defer f.Close()
	var events []pcr.Event
	if err := strictjson.Read(f, maxLog, &events); err != nil {
		return nil, fmt.Errorf("read measurement log: %w", err)
	}
	if len(events) > pcr.MaxEvents {
		return nil, errors.New("read measurement log: too many events")
	}
	return events, nil
}
