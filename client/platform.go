package client

import (
	"context"
	"net/http"
	"net/url"

	"foothold/protocol/api"
	"foothold/protocol/evidence"
)

// HostPlatform asks a host what it measures, and has it judged by the reference values in
// force.
func (c *Client) HostPlatform(ctx context.Context, host string) (j api.Judged, err error) {
	return j, c.call(ctx, http.MethodGet, "/v1/hosts/"+url.PathEscape(host)+"/platform", nil, &j)
}

// HostEvidence returns a host's logs as it gives them now.
func (c *Client) HostEvidence(ctx context.Context, host string) (p evidence.Platform, err error) {
	return p, c.call(ctx, http.MethodGet, "/v1/hosts/"+url.PathEscape(host)+"/evidence", nil, &p)
}

// TryPlatform has every host, or one, judged by other reference values: the JSON of a
// platform.Manifest.
func (c *Client) TryPlatform(ctx context.Context, manifest []byte, host string) (list []api.Judged, err error) {
	path := "/v1/platform/try"
	if host != "" {
		path += "?host=" + url.QueryEscape(host)
	}
	return list, c.call(ctx, http.MethodPost, path, api.TryPlatform{Manifest: manifest}, &list)
}
