package broker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"foothold/internal/tpm"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
)

// Numbers of TPM 2.0 Library, part 2.
const (
	tagNoSessions = 0x8001
	tagSessions   = 0x8002

	ccFlushContext     = 0x165
	ccPCRExtend        = 0x182
	ccPCRReset         = 0x13d
	ccQuote            = 0x158
	ccStartAuthSession = 0x176

	handleNull    = 0x40000007
	sessionHMAC   = 0x00 // TPM_SE
	algAES        = 0x0006
	algSHA256     = 0x000b
	algNull       = 0x0010
	algECDSA      = 0x0018
	algCFB        = 0x0043
	aesBits       = 128
	attrContinue  = 0x01 // TPMA_SESSION: the session outlives the command
	attrDecrypt   = 0x20 // the command's first parameter is encrypted
	attrEncrypt   = 0x40 // the response's first parameter is encrypted
	nonceMin      = 16
	nonceMax      = 32
	saltMax       = 68 // TPMS_ECC_POINT on P-256
	qualifyingLen = 32 // evidence.Binding
	macLen        = 32 // HMAC-SHA-256
	selectLen     = 3  // bytes of a PCR bitmap on PC clients

	handleTypeHMAC = 0x02 // most significant byte of a session handle
)

// kind is a command that a VM may send.
type kind int

const (
	startSession kind = iota + 1
	quote
	flush
)

// request is a command of the one permitted shape.
type request struct {
	kind    kind
	session uint32 // that quote uses or flush ends
	own     bool   // the session is salted to the tenant's own key
	last    bool   // the session ends with the command, if the TPM carries it out
}

var errShape = errors.New("TPM command is not of the permitted shape")

// reader takes fields from the front. After its first failure it stays failed.
type reader struct {
	rest []byte
	err  error
}

func (r *reader) take(n int) []byte {
	if r.err != nil || len(r.rest) < n {
		r.err = errShape
		return nil
	}
	field := r.rest[:n]
	r.rest = r.rest[n:]
	return field
}

func (r *reader) u8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// want fails unless the two are equal.
func (r *reader) want(field string, got, want uint32) {
	if r.err == nil && got != want {
		r.err = fmt.Errorf("%w: %s is %#x", errShape, field, got)
	}
}

// sized takes a TPM2B of least to most bytes.
func (r *reader) sized(field string, least, most int) []byte {
	n := int(r.u16())
	if r.err == nil && (n < least || n > most) {
		r.err = fmt.Errorf("%w: %s has %d bytes", errShape, field, n)
	}
	return r.take(n)
}

// end fails unless everything was taken.
func (r *reader) end() error {
	if r.err == nil && len(r.rest) != 0 {
		r.err = fmt.Errorf("%w: %d bytes too many", errShape, len(r.rest))
	}
	return r.err
}

// parse accepts the three commands of a boot quote, each in exactly the shape in
// which a boot server sends it (TPM 2.0 Library, part 3), and refuses all else.
func parse(command []byte) (request, error) {
	if len(command) > tpm.MaxMessage {
		return request{}, errShape
	}
	r := &reader{rest: command}
	tag, size, code := r.u16(), r.u32(), r.u32()
	r.want("size", size, uint32(len(command)))
	if r.err != nil {
		return request{}, r.err
	}
	switch code {
	case ccStartAuthSession:
		r.want("tag", uint32(tag), tagNoSessions)
		return parseStart(r)
	case ccQuote:
		r.want("tag", uint32(tag), tagSessions)
		return parseQuote(r)
	case ccFlushContext:
		r.want("tag", uint32(tag), tagNoSessions)
		session := r.u32()
		return request{kind: flush, session: session}, r.end()
	}
	return request{}, fmt.Errorf("%w: command code %#x", errShape, code)
}

// parseStart reads TPM2_StartAuthSession: an HMAC session salted to the inventoried
// key, or to the tenant's own, bound to nothing, with AES-128-CFB for parameters and SHA-256.
func parseStart(r *reader) (request, error) {
	key := r.u32()
	if key != inventory.TenantHandle {
		r.want("tpmKey", key, inventory.SessionHandle)
	}
	r.want("bind", r.u32(), handleNull)
	r.sized("nonceCaller", nonceMin, nonceMax)
	r.sized("encryptedSalt", 1, saltMax)
	r.want("sessionType", uint32(r.u8()), sessionHMAC)
	r.want("symmetric", uint32(r.u16()), algAES)
	r.want("keyBits", uint32(r.u16()), aesBits)
	r.want("mode", uint32(r.u16()), algCFB)
	r.want("authHash", uint32(r.u16()), algSHA256)
	return request{kind: startSession, own: key == inventory.TenantHandle}, r.end()
}

// parseQuote reads TPM2_Quote: by the AIK, authorised by one session that encrypts
// parameters both ways, over exactly the registers of a boot quote. The qualifying
// data is the first parameter and thus encrypted; all that follows is in clear.
func parseQuote(r *reader) (request, error) {
	r.want("signHandle", r.u32(), inventory.AIKHandle)
	area := &reader{rest: r.take(int(min(r.u32(), tpm.MaxMessage)))}
	session := area.u32()
	area.sized("nonceCaller", nonceMin, nonceMax)
	attributes := area.u8()
	area.want("sessionAttributes", uint32(attributes)&^attrContinue, attrDecrypt|attrEncrypt)
	area.sized("hmac", macLen, macLen)
	if err := area.end(); err != nil {
		return request{}, err
	}
	r.sized("qualifyingData", qualifyingLen, qualifyingLen)
	if scheme := r.u16(); scheme != algNull {
		r.want("inScheme", uint32(scheme), algECDSA)
		r.want("inScheme hash", uint32(r.u16()), algSHA256)
	}
	r.want("PCR selections", r.u32(), 1)
	r.want("PCR bank", uint32(r.u16()), algSHA256)
	r.want("PCR bitmap length", uint32(r.u8()), selectLen)
	if bits := r.take(selectLen); bits != nil && !bytes.Equal(bits, bitmap(pcr.BootSelection())) {
		return request{}, fmt.Errorf("%w: PCR selection is %x", errShape, bits)
	}
	return request{kind: quote, session: session, last: attributes&attrContinue == 0}, r.end()
}

// bitmap encodes a selection (TPMS_PCR_SELECTION: register 0 is bit 0 of byte 0).
func bitmap(selection []int) []byte {
	bits := make([]byte, selectLen)
	for _, i := range selection {
		bits[i/8] |= 1 << (i % 8)
	}
	return bits
}

// startedSession reads the response to a StartAuthSession that succeeded.
func startedSession(response []byte) (uint32, bool) {
	r := &reader{rest: response}
	r.want("tag", uint32(r.u16()), tagNoSessions)
	r.want("size", r.u32(), uint32(len(response)))
	r.want("responseCode", r.u32(), 0)
	handle := r.u32()
	r.sized("nonceTPM", nonceMin, nonceMax)
	r.want("handle type", handle>>24, handleTypeHMAC)
	return handle, r.end() == nil
}

// succeeded reports whether a response says so.
func succeeded(response []byte) bool {
	return len(response) >= 10 && binary.BigEndian.Uint32(response[6:10]) == 0
}

// flushed is the response to a FlushContext that succeeded.
func flushed() []byte {
	response := binary.BigEndian.AppendUint16(nil, tagNoSessions)
	response = binary.BigEndian.AppendUint32(response, 10)
	return binary.BigEndian.AppendUint32(response, 0)
}
