package site

import (
	"encoding/json"
	"net"
	"testing"

	"foothold/client"
	"foothold/internal/mtls"
	"foothold/tenant/authority"
	"foothold/tenant/verify"
)

// operator is a client of the operators' API.
func operator(t *testing.T, s *Site) *client.Client {
	t.Helper()
	files, err := s.issue(s.tenant, authority.Operator, mtls.Operator, "operator", authority.Client)
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(s.conf.API)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.Dial(client.Context{Name: "site", Server: "localhost:" + port, CA: files.CA, Cert: files.Cert, Key: files.Key})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// bundles are a VM's evidence, as the orchestrator gives it to operators, oldest first.
func (a attack) bundles(id string) (list []verify.Bundle) {
	a.t.Helper()
	c := operator(a.t, a.s)
	e, err := c.Evidence(a.t.Context(), id, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	for _, v := range e.Verdicts {
		data, err := c.Bundle(a.t.Context(), id, v.Digest)
		if err != nil {
			a.t.Fatal(err)
		}
		var b verify.Bundle
		if err := json.Unmarshal(data, &b); err != nil {
			a.t.Fatal(err)
		}
		list = append(list, b)
	}
	return list
}
