package broker

import (
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// The broker's own session serves many resets and extends, because its start costs the TPM
// as much as a quote. It is one of the three that a TPM has room for. It is begun anew after
// any error, after so many uses, and after some time; docs/decisions/025 says what that
// bounds.
const (
	ownUses = 256
	ownTime = 10 * time.Minute
)

// ownSession is an HMAC session for commands on one register that are authorised by it
// alone (TPM 2.0 Library, part 1, "Session-based authorizations"). Each command has a fresh
// nonce of ours and answers the TPM's last, so no command or response is taken twice, out
// of its order, or for another.
type ownSession struct {
	handle uint32
	key    []byte
	nonce  []byte // the TPM's last
	began  time.Time
	uses   int
}

// inSession runs do in the broker's own session; do must be such that it can be begun anew. It
// is, once, when the TPM no longer has a session that served before: it forgets them when
// the host sleeps. It must be called with mu held.
func (b *Broker) inSession(do func(*ownSession) error) error {
	if s := b.ours; s != nil && (s.uses >= ownUses || time.Since(s.began) >= ownTime) {
		if err := b.dropOwn(); err != nil {
			return err
		}
	}
	served := b.ours != nil
	err := b.tryOwn(do)
	if served && errors.Is(err, tpm2.TPMRCReferenceS0) {
		err = b.tryOwn(do)
	}
	return err
}

// tryOwn must be called with mu held.
func (b *Broker) tryOwn(do func(*ownSession) error) (err error) {
	if b.ours == nil {
		if b.ours, err = startOwnSession(b.dev, b.session); err != nil {
			return fmt.Errorf("start session: %w", err)
		}
	}
	b.ours.uses++
	err = do(b.ours)
	switch {
	case errors.Is(err, tpm2.TPMRCReferenceS0):
		b.ours = nil // not flushed: a VM's session may have its number by now, outside the TPM
	case err != nil:
		err = errors.Join(err, b.dropOwn())
	}
	return err
}

// dropOwn must be called with mu held.
func (b *Broker) dropOwn() error {
	handle := tpm2.TPMHandle(b.ours.handle)
	b.ours = nil
	if _, err := (tpm2.FlushContext{FlushHandle: handle}).Execute(b.dev); err != nil && !isGone(err) {
		return fmt.Errorf("flush session: %w", err)
	}
	return nil
}

// isGone reports whether the TPM says that it has no such session.
func isGone(err error) bool {
	return errors.Is(err, tpm2.TPMRCHandle) || errors.Is(err, tpm2.TPMRCValue) || errors.Is(err, tpm2.TPMRCReferenceH0)
}

// startOwnSession begins a session salted to a key, so that only the TPM that has it learns
// the session's key.
func startOwnSession(dev transport.TPM, salted tpm.Key) (*ownSession, error) {
	public, err := tpm2.ImportEncapsulationKey(&salted.Public)
	if err != nil {
		return nil, err
	}
	salt, encrypted, err := tpm2.CreateEncryptedSalt(rand.Reader, public)
	if err != nil {
		return nil, err
	}
	defer clear(salt)
	nonce := newNonce()
	rsp, err := tpm2.StartAuthSession{
		TPMKey: salted.Handle, Bind: tpm2.TPMRHNull,
		NonceCaller: tpm2.TPM2BNonce{Buffer: nonce}, EncryptedSalt: tpm2.TPM2BEncryptedSecret{Buffer: encrypted},
		SessionType: tpm2.TPMSEHMAC, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull}, AuthHash: tpm2.TPMAlgSHA256,
	}.Execute(dev)
	if err != nil {
		return nil, err
	}
	return &ownSession{
		handle: rsp.SessionHandle.HandleValue(),
		key:    tpm2.KDFa(crypto.SHA256, salt, "ATH", rsp.NonceTPM.Buffer, nonce, 8*sha256.Size),
		nonce:  rsp.NonceTPM.Buffer,
		began:  time.Now(),
	}, nil
}

func newNonce() []byte {
	nonce := make([]byte, nonceSize)
	rand.Read(nonce)
	return nonce
}

// reset resets PCR 16 and 23.
func (s *ownSession) reset(dev transport.TPM) error {
	for _, index := range []int{pcr.VM, pcr.Tunnel} {
		if err := s.run(dev, ccPCRReset, index, nil); err != nil {
			return fmt.Errorf("reset PCR %d: %w", index, err)
		}
	}
	return nil
}

func (s *ownSession) extend(dev transport.TPM, e pcr.Event) error {
	digests := binary.BigEndian.AppendUint32(nil, 1) // TPML_DIGEST_VALUES
	digests = binary.BigEndian.AppendUint16(digests, algSHA256)
	digests = append(digests, e.Digest[:]...)
	if err := s.run(dev, ccPCRExtend, e.PCR, digests); err != nil {
		return fmt.Errorf("extend PCR %d: %w", e.PCR, err)
	}
	return nil
}

// run carries out a command on one register, whose authorisation value is empty.
func (s *ownSession) run(dev transport.TPM, code uint32, register int, parameters []byte) error {
	nonce := newNonce()
	hash := sha256.New() // cpHash: command code, the handle's name, parameters
	hash.Write(binary.BigEndian.AppendUint32(nil, code))
	hash.Write(binary.BigEndian.AppendUint32(nil, uint32(register))) // a register's name is its handle
	hash.Write(parameters)
	const authorisation = 4 + 2 + nonceSize + 1 + 2 + macLen
	size := 10 + 4 + 4 + authorisation + len(parameters)
	c := binary.BigEndian.AppendUint16(make([]byte, 0, size), tagSessions)
	c = binary.BigEndian.AppendUint32(c, uint32(size))
	c = binary.BigEndian.AppendUint32(c, code)
	c = binary.BigEndian.AppendUint32(c, uint32(register))
	c = binary.BigEndian.AppendUint32(c, authorisation)
	c = binary.BigEndian.AppendUint32(c, s.handle)
	c = append(binary.BigEndian.AppendUint16(c, nonceSize), nonce...)
	c = append(c, attrContinue)
	c = append(binary.BigEndian.AppendUint16(c, macLen), s.mac(hash.Sum(nil), nonce, s.nonce)...)
	response, err := dev.Send(append(c, parameters...))
	if err != nil {
		return err
	}
	return s.take(response, code, nonce)
}

// take accepts the response to a command that has no parameters in it, of this session's
// TPM and to this command alone. An error is in clear and nobody's word for it.
func (s *ownSession) take(response []byte, code uint32, ours []byte) error {
	r := &reader{rest: response}
	tag, size, rc := r.u16(), r.u32(), r.u32()
	r.want("size", size, uint32(len(response)))
	if r.err == nil && rc != 0 {
		return tpm2.TPMRC(rc)
	}
	r.want("tag", uint32(tag), tagSessions)
	r.want("parameters", r.u32(), 0)
	nonce := r.sized("nonceTPM", nonceSize, nonceMax)
	r.want("sessionAttributes", uint32(r.u8()), attrContinue)
	mac := r.sized("hmac", macLen, macLen)
	if err := r.end(); err != nil {
		return fmt.Errorf("response: %w", err)
	}
	hash := sha256.New() // rpHash: response code, command code, parameters
	hash.Write(binary.BigEndian.AppendUint32(nil, rc))
	hash.Write(binary.BigEndian.AppendUint32(nil, code))
	if !hmac.Equal(mac, s.mac(hash.Sum(nil), nonce, ours)) {
		return errNotTheTPM
	}
	s.nonce = append([]byte(nil), nonce...)
	return nil
}

// errNotTheTPM says that something between broker and TPM answers, or has altered what either says.
var errNotTheTPM = errors.New("the response is not the TPM's")

// mac authenticates a hash of parameters, under both sides' nonces and this session's one
// attribute.
func (s *ownSession) mac(parameters, newer, older []byte) []byte {
	mac := hmac.New(sha256.New, s.key)
	mac.Write(parameters)
	mac.Write(newer)
	mac.Write(older)
	mac.Write([]byte{attrContinue})
	return mac.Sum(nil)
}
