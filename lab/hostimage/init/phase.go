package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"foothold/internal/tpm"
	"foothold/lab/hostimage"
	"foothold/protocol/digest"
	"foothold/protocol/platform"
	"foothold/provider/measure"

	"github.com/google/go-tpm/tpm2"
)

// phase does what systemd-pcrphase does with a word: it extends register 11, and adds a
// record to the log (systemd, src/boot/pcrphase.c, src/shared/tpm2-util.c).
func phase(word string) (err error) {
	sum := digest.Of([]byte(word))
	dev, err := tpm.Open(hostimage.TPMDevice)
	if err != nil {
		return err
	}
	defer dev.Close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: platform.PhaseRegister, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: sum[:]}}},
	}.Execute(dev)
	if err != nil {
		return err
	}
	type object map[string]any
	record, err := json.Marshal(object{"pcr": platform.PhaseRegister, "digests": []object{{"hashAlg": "sha256", "digest": sum.String()}},
		"content_type": "systemd", "content": object{"string": word, "eventType": "phase"}})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(measure.SystemdLog), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(measure.SystemdLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = log.Write(append(append([]byte{0x1e}, record...), '\n'))
	return errors.Join(err, log.Close())
}
